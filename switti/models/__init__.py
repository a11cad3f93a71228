"""The scale transformer: blocks, attention, norms, rotary embedding, crop embedding."""
