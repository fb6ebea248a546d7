"""The model itself, without weights from anywhere: shapes, positions, text to ids, images to pixels, towers."""
