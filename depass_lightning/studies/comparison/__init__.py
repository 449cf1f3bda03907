"""Attribution methods side by side."""
