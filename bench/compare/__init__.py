"""Whether mergekit's configs give mergekit's models: the same config through both programs, tensor by tensor."""
