//! What can be wrong with data.

use std::path::{Path, PathBuf};

use super::Sequence;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why text, rows or a tokenizer could not be read. Errors of one row are wrapped in [`Error::Row`], which names file
/// and line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// One row is unusable.
    #[error("{}:{line}: {cause}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with the row.
        cause: Box<Error>,
    },
    /// The name of a data file does not say how to read it.
    #[error(
        "{}: unknown kind of data file; expected a name that ends in .jsonl or .json (rows), .jsonl.gz, .parquet or .txt (plain text)",
        path.display()
    )]
    FileKind {
        /// The file.
        path: PathBuf,
    },
    /// A folder without data files.
    #[error("{}: no data file in the folder; expected names that end in .jsonl, .json, .jsonl.gz, .parquet or .txt", path.display())]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A Parquet file, which this build does not read.
    #[error("{}: reading Parquet needs the feature `parquet` of moe-data", path.display())]
    NoParquet {
        /// The file.
        path: PathBuf,
    },
    /// A Parquet file that cannot be read.
    #[error("not a readable Parquet file: {message}")]
    Parquet {
        /// What the reader said.
        message: String,
    },
    /// A file that stopped being readable; wrapped in [`Error::Io`] with its name.
    #[error("{0}")]
    Unreadable(std::io::Error),
    /// A field that no row has.
    #[error("unknown field {name:?}; a row may have {known}")]
    UnknownField {
        /// What was asked for.
        name: String,
        /// The fields there are.
        known: String,
    },
    /// A column that a field is to be read from and the row lacks.
    #[error("no column {column:?} to read {field:?} from; the row has {found:?}")]
    MissingColumn {
        /// The column.
        column: String,
        /// The field it is read as.
        field: String,
        /// Columns the row has.
        found: Vec<String>,
    },
    /// Files to be mixed of which one has no share.
    #[error("{}: found weight {weight}, expected a positive number, for every file or for none", path.display())]
    Weight {
        /// The file.
        path: PathBuf,
        /// Its weight.
        weight: String,
    },
    /// Nothing in the file.
    #[error("{}: the file has no row", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// Rows, but none to learn or measure from.
    #[error("{}: no usable row: all {dropped} have fewer than {} tokens or no token that counts in the loss", path.display(), Sequence::MIN_LEN)]
    NoUsableRow {
        /// The file.
        path: PathBuf,
        /// Rows read and dropped.
        dropped: usize,
    },
    /// Every row was skipped.
    #[error("{}: no usable row: {skipped} could not be read, the first of them {first}", path.display())]
    OnlyBadRows {
        /// The file.
        path: PathBuf,
        /// Rows skipped.
        skipped: usize,
        /// What is wrong with the first of them.
        first: String,
    },
    /// Bytes that are not UTF-8.
    #[error("not valid UTF-8 after byte {valid_up_to} of the line")]
    Utf8 {
        /// Bytes of the line that are valid.
        valid_up_to: usize,
    },
    /// Not JSON.
    #[error("not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A line that breaks off.
    #[error("not valid JSON: {cause}; a row is one JSON object per line, or all rows are pretty-printed or one array")]
    Unfinished {
        /// What the parser says.
        cause: serde_json::Error,
    },
    /// A JSON value that is not an object.
    #[error("found {found}, expected a JSON object with one of {}", super::rows::FORMS)]
    NotAnObject {
        /// Kind of the JSON value.
        found: &'static str,
    },
    /// None of the forms of a row.
    #[error("fields {found:?}, expected one of {expected}")]
    MissingFields {
        /// Fields the row has.
        found: Vec<String>,
        /// Fields it could have.
        expected: &'static str,
    },
    /// More than one of the forms of a row.
    #[error(
        "the row could be read as {first} or as {second}: keep the fields of one of them, or choose by a field \
         (--field NAME=COLUMN, such as --field text=text)"
    )]
    Ambiguous {
        /// One form.
        first: &'static str,
        /// Another one.
        second: &'static str,
    },
    /// A field of the wrong type.
    #[error("field {field:?}: found {found}, expected {expected}")]
    Field {
        /// The field, with an index for an element of an array.
        field: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// A token the model has no embedding for.
    #[error("token id {id} at position {position}: expected less than the vocabulary size {vocab_size}")]
    TokenId {
        /// The token id.
        id: u64,
        /// Its position in the row.
        position: usize,
        /// Vocabulary size of the model.
        vocab_size: usize,
    },
    /// Text without a tokenizer.
    #[error("a row of text needs a tokenizer.json; without one only rows of \"input_ids\" can be read")]
    NoTokenizer,
    /// The tokenizer refused a text.
    #[error("the tokenizer failed: {message}")]
    Tokenize {
        /// The tokenizer's message.
        message: String,
    },
    /// There is no tokenizer.json.
    #[error(
        "{}: No such file; {}python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{dir}').save_pretrained('{dir}')\"", path.display(), vocabularies(found), dir = dir.display()
    )]
    NoTokenizerFile {
        /// The file that is missing.
        path: PathBuf,
        /// The model directory.
        dir: PathBuf,
        /// Names of files beside it that hold a vocabulary in another format.
        found: Vec<String>,
    },
    /// A file of the tokenizer is malformed.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// Messages without a chat template.
    #[error(
        "a row of \"messages\" needs a chat template: found neither chat_template.jinja nor \"chat_template\" in tokenizer_config.json"
    )]
    NoChatTemplate,
    /// The chat template failed.
    #[error("chat template: {message}")]
    ChatTemplate {
        /// The template engine's message.
        message: String,
    },
    /// The loss was asked for over completions that the row does not mark.
    #[error(
        "a loss over completions needs rows of \"prompt\" and \"completion\", of \"messages\", of \"instruction\" and \"output\" or of \
         \"input_ids\" with \"labels\", found {found}"
    )]
    NoCompletion {
        /// The form of the row.
        found: &'static str,
    },
    /// The end-of-sequence token is needed but unknown.
    #[error("{purpose} needs an end-of-sequence token, and tokenizer_config.json names no \"eos_token\"")]
    NoEos {
        /// What needs it.
        purpose: &'static str,
    },
    /// An option out of range.
    #[error("option {field}: found {found}, expected {expected}")]
    Options {
        /// The option.
        field: &'static str,
        /// Its value.
        found: usize,
        /// The range allowed.
        expected: &'static str,
    },
    /// A shard that does not exist.
    #[error("shard {index} of {count}: the index must be below the number of shards")]
    Shard {
        /// Index of the shard, from 0.
        index: usize,
        /// Number of shards.
        count: usize,
    },
    /// An evaluation file whose name carries no name.
    #[error("{}: expected an evaluation file named NAME_test.jsonl", path.display())]
    EvalName {
        /// The file.
        path: PathBuf,
    },
    /// Rows of both kinds in one evaluation file.
    #[error(
        "a row with \"{found}\" in a file that began with rows of \"{expected}\": exact match and perplexity need a file each"
    )]
    MixedEval {
        /// What this row has.
        found: &'static str,
        /// What the rows before it had.
        expected: &'static str,
    },
}

/// What can be done about a missing tokenizer.json, up to the command.
fn vocabularies(found: &[String]) -> String {
    match found {
        [] => "copy it from where the model is from, or let transformers write it: ".to_owned(),
        found => format!("found {}, from which transformers can make and save it: ", found.join(" and ")),
    }
}

impl Error {
    /// Adds file and line.
    pub(super) fn at(self, path: &Path, line: usize) -> Self {
        Self::Row { path: path.to_owned(), line, cause: Box::new(self) }
    }

    /// Whether it is one row that is bad, rather than the file, the options or the tokenizer.
    pub(super) fn is_of_a_row(&self) -> bool {
        match self {
            Self::Row { cause, .. } => !matches!(
                **cause,
                Self::NoTokenizer
                    | Self::NoChatTemplate
                    | Self::NoCompletion { .. }
                    | Self::NoEos { .. }
                    | Self::Unreadable(_)
            ),
            _ => false,
        }
    }

    /// For `map_err` on an operation on a file.
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
