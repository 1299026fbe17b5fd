"""The fault matrix: whatever dies at whatever point, the old or the new version serves."""
