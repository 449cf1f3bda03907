"""Generated text: vocabularies, facts and the bundled model's corpus."""
