"""The prompting experiments: levels of a behaviour asked for in words against doses of its vector, and attacks on what was asked for."""
