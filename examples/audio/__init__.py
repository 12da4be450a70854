"""A generated world of sounds, a careless transcriber, and a small Whisper that is to mend what he leaves out."""
