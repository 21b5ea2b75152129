"""The conductor: rounds, run folders, the journal, and the verbs of the command line."""
