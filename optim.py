AdamW = None
