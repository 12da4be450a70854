-- The ratings file. Its version is store.VERSION.
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE questions (
    id TEXT PRIMARY KEY, number INTEGER NOT NULL, prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL,
    gold INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE raters (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE orders (
    rater INTEGER NOT NULL REFERENCES raters, place INTEGER NOT NULL, question TEXT NOT NULL REFERENCES questions,
    a_left INTEGER NOT NULL, PRIMARY KEY (rater, place), UNIQUE (rater, question)) WITHOUT ROWID;
CREATE TABLE ratings (
    id INTEGER PRIMARY KEY AUTOINCREMENT, rater INTEGER NOT NULL, question TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'both_bad', 'skip')), scales TEXT,
    client_id TEXT NOT NULL UNIQUE, created TEXT NOT NULL,
    UNIQUE (rater, question), FOREIGN KEY (rater, question) REFERENCES orders (rater, question));
CREATE TABLE undone (
    client_id TEXT PRIMARY KEY, rater INTEGER NOT NULL, question TEXT NOT NULL, choice TEXT NOT NULL, scales TEXT,
    created TEXT NOT NULL, undone TEXT NOT NULL) WITHOUT ROWID;
