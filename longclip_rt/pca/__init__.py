"""The PCA of embeddings: applied, fitted, judged, drawn."""
