"""What `longclip_rt.checkpoint` is made of: where weights come from, what their tensors are called, what is refused."""
