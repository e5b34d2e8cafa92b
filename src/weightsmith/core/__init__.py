"""Names and roles of tensors, errors, parameters, what a method may see, what a method is; no input or output."""
