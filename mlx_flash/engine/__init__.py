"""The paper: one layer's FFN from flash. Knows layers, ids, slots and bytes; no model, no tokenizer, no user."""
