"""Serves a checkpoint: the web page (`web_page`), its conversations, limits and audio."""
