"""Learning tasks in turn: the tasks, the learners, and what is measured of them."""
