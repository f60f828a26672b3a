"""What differs between operating systems and machines."""
