"""`make bench`: weightsmith against mergekit and against a plain copy, on the same files in one run.

models    the checkpoints that are merged (made up, cached)
merges    what is computed: the same merge in the words of both programs
measure   one whole process: wall time, processor time, peak memory
mergekit  mergekit in a virtual environment of its own
agree     whether both sides computed the same
series    repetitions in turn, and the memory check
table     ratios and tables
"""
