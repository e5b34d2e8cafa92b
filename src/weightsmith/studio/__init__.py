"""The studio: models, recipes, runs and results in a browser, on this machine only.

Everything it does is a recipe and a command of weightsmith, shown on the page.  Pages are rendered here, by the
functions that the command line prints with; a job is a process of its own, which outlives the server.
"""
