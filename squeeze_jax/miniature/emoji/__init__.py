"""The miniature's world of emoji: subjects that others drew, in scenes that are drawn here."""
