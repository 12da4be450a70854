"""Blind A/B rating by people: the questions, the database, the page's server, and what the ratings say."""
