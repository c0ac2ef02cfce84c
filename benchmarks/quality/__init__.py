"""Quality against bytes and against the learning rate: the same tasks, budgets and searches for every PEFT method."""
