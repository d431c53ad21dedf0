"""Judges: what turns a reply into a score. The embedded judge needs no network, no key and no language model."""
