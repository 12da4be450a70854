-- What is kept of those who consent. Its version is prompt_store.VERSION. secure_delete is on: what is removed is overwritten.
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, prompt TEXT NOT NULL, held_out INTEGER NOT NULL, bytes INTEGER NOT NULL,
    created TEXT NOT NULL);
CREATE TABLE answers (
    completion TEXT NOT NULL, place INTEGER NOT NULL, prompt INTEGER NOT NULL REFERENCES prompts ON DELETE CASCADE,
    answer TEXT NOT NULL, version INTEGER NOT NULL, thumb INTEGER CHECK (thumb IN (-1, 1)), bytes INTEGER NOT NULL,
    PRIMARY KEY (completion, place)) WITHOUT ROWID;
-- Numbers of prompts that somebody removed: a training that reads one must end.
CREATE TABLE removed (id INTEGER PRIMARY KEY);
CREATE INDEX answers_by_prompt ON answers (prompt, bytes);
CREATE INDEX prompts_by_bytes ON prompts (bytes);
