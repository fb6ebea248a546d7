"""Any weights in: where they come from, what their tensors are called, what is refused; and out again."""
