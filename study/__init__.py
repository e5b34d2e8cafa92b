"""A study of every merging method on real models, trained here.  Run it with `make study [DATA=FOLDER]`."""
