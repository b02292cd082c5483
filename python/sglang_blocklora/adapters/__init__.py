"""Reading and checking PEFT adapters, and cutting them for one TP rank."""
