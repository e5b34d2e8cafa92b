"""What verbs print: results of the layers below as tables and lines, and as plain values for JSON."""
