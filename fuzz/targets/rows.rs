//! Fuzzes the reader of rows, in each form and for a small number of rows.
#![no_main]

use std::io::Cursor;
use std::path::Path;

use detox_gguf::text::rows::{self, CONTINUATION, LANGUAGE, PROMPT, Rows, TEXT, Wanted};
use detox_gguf::text::{chat_markers, language, printable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    // The extension is part of the decision, and so is a form that the user names.
    let path = Path::new(["a", "a.jsonl", "a.csv", "a.txt", "a.md", "a.gz"][usize::from(choice % 6)]);
    let form = [None, Some(Wanted::Json), Some(Wanted::Table), Some(Wanted::Lines)][usize::from(choice / 6 % 4)];
    let rows = match Rows::new(path, "rows", Box::new(Cursor::new(data)), form, &[]) {
        Ok(rows) => rows,
        Err(error) => return show(&error),
    };
    // The formats may expand: a hundred rows of a compressed file are enough.
    for row in rows.limited().take(100) {
        let row = match row {
            Ok(row) => row,
            Err(error) => return show(&error),
        };
        assert!(row.line > 0);
        for column in [PROMPT, TEXT, CONTINUATION] {
            if let Some((name, value)) = column.find(&row.fields, None)
                && let Ok(text) = rows::text(name, value)
            {
                let _ = chat_markers::find(text);
            }
        }
        if let Some((_, value)) = LANGUAGE.optional(&row.fields, None) {
            let _ = value.as_str().map(language::recognise);
        }
        for value in row.fields.values() {
            let _ = (rows::number(value), rows::label(value), rows::is_missing(value));
        }
    }
});

/// A message has no character that a terminal acts on.
fn show(error: &detox_gguf::Error) {
    let message = error.to_string();
    assert!(!message.is_empty());
    assert!(!printable(&message).chars().any(|c| c.is_control()));
}
