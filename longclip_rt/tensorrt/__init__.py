"""TensorRT engines that exist: which there are, what each belongs to, how one runs."""
