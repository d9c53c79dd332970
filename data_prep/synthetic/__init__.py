"""The demo's miniature of the challenge: scenes, a simulated camera, simulated generators."""
