"""What keeps the documents: small figures, HTML made of the Markdown."""
