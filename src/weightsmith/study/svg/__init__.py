"""Pictures as text: a strict parser, a renderer for a subset of SVG, seeded scenes and their scores."""
