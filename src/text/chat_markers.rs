//! Finds the markers of chat templates in texts, which are read as plain letters.

/// Markers without a form of their own.
const FIXED: [&str; 8] = [
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[gMASK]",
];

/// The first chat marker in a text: `<|im_start|>`, `[INST]`, `<start_of_turn>`, `<|user|>` and the like.
pub fn find(text: &str) -> Option<&str> {
    let fixed = FIXED.iter().filter_map(|marker| text.find(marker).map(|at| &text[at..at + marker.len()]));
    let framed = [("<|", "|>"), ("<\u{ff5c}", "\u{ff5c}>")].into_iter().filter_map(|(open, close)| {
        text.match_indices(open).find_map(|(at, _)| {
            let rest = &text[at + open.len()..];
            let end = rest.find(close)?;
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '\u{2581}';
            let is_marker = (1..=40).contains(&end) && rest[..end].chars().all(is_name);
            is_marker.then(|| &text[at..at + open.len() + end + close.len()])
        })
    });
    fixed.chain(framed).min_by_key(|marker| marker.as_ptr() as usize)
}

/// Counts texts with chat markers, for one warning per file.
#[derive(Debug, Default)]
pub struct Count {
    n_texts: usize,
    n_marked: usize,
    example: String,
}

impl Count {
    /// Adds a row's texts.
    pub fn add(&mut self, texts: &[&str]) {
        self.n_texts += 1;
        if let Some(marker) = texts.iter().find_map(|text| find(text)) {
            self.n_marked += 1;
            if self.example.is_empty() {
                marker.clone_into(&mut self.example);
            }
        }
    }

    /// Warns once if there were any. `noun` is what the rows are: "prompts".
    pub fn warn(&self, path: &std::path::Path, noun: &str) {
        if self.n_marked > 0 {
            tracing::warn!(
                "{}: {} of {} {noun} contain chat markers such as {:?}. They are read as plain letters: chat \
                 templates are not supported yet",
                path.display(),
                self.n_marked,
                self.n_texts,
                self.example
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_of_every_family_are_found_and_similar_text_is_not() {
        for marker in
            ["<|im_start|>", "<|user|>", "<|eot_id|>", "[INST]", "<start_of_turn>", "<｜User｜>", "<<SYS>>"]
        {
            assert_eq!(find(&format!("a {marker} b <|im_end|>")), Some(marker));
        }
        for text in ["a <| b |> c", "[INST", "a < b | c > d", "<||>", "if (a <|b) |>", ""] {
            assert_eq!(find(text), None, "{text}");
        }
    }
}
