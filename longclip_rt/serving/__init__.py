"""The HTTP server: batches across requests, OpenAI's embeddings API, search, and a page for people."""
