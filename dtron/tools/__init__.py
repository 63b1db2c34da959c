"""Programs: verify, show, generate, profile. No module outside this folder imports them."""
