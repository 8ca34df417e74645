"""Where the README's figures come from: one command each, which prints device and versions first."""
