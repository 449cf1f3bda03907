"""One call of `DePass`, in reading order: settings, forward, scoring, attribute."""
