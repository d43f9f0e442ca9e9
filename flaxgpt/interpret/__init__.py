"""What a model makes of a text: logits, their meaning layer by layer, attention; as data, tables, pictures and a page."""
