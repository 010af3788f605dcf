"""The losses as drop-in parts of other trainers. Each module says what it needs; this one imports none of them."""
