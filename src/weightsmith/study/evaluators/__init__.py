"""How a task is measured on a model: built in, by lm_eval or mteb in a process of their own, or by any program."""
