"""Text by itself: where speech is cut into segments, languages, fonts."""
