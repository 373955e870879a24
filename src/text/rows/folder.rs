//! Files of rows in a folder, by their names.

use std::path::{Path, PathBuf};

use super::column::listed;
use super::sniff::extension;

/// Whether a file's name ends like that of JSON, a table or plain text.
pub fn has_rows(path: &Path) -> bool {
    is_table_name(path)
        || matches!(extension(path).as_str(), "jsonl" | "json" | "ndjson" | "jsonlines" | "geojson" | "txt")
}

/// Whether a file's name ends like that of a table.
pub fn is_table_name(path: &Path) -> bool {
    matches!(extension(path).as_str(), "csv" | "tsv" | "tab" | "psv")
}

/// The names of files that may have rows but are not read, for messages. `None` if there are none.
pub fn skipped_names(skipped: &[PathBuf]) -> Option<String> {
    let is_other =
        |path: &&PathBuf| matches!(extension(path).as_str(), "xlsx" | "xls" | "ods" | "parquet" | "arrow");
    let files = skipped.iter().filter(|path| has_rows(path) || is_other(path));
    let names: Vec<String> =
        files.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    (!names.is_empty()).then(|| listed(names.iter().map(String::as_str)))
}
