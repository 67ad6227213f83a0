//! Rows from files, of every kind and layout they are held in.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::json::JsonValues;
use super::{FIELDS, Row, fields};
use crate::Error;

/// How rows are read from a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reading {
    /// Columns of the file by the field they are read as: `{"prompt": "question", "completion": "answer"}`. If any is
    /// given, only the fields named here decide what form a row has, which also chooses between two forms that a row
    /// has at once.
    pub fields: BTreeMap<String, String>,
    /// Leave out rows that cannot be read, and count them, instead of stopping at the first.
    pub skip_bad_rows: bool,
}

impl Reading {
    /// Checks the names of fields.
    ///
    /// # Errors
    /// [`Error::UnknownField`] for a name that no row has.
    pub fn check(&self) -> Result<(), Error> {
        match self.fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
            Some(name) => Err(Error::UnknownField { name: name.clone(), known: FIELDS.join(", ") }),
            None => Ok(()),
        }
    }

    /// Whether nothing is asked for.
    pub(crate) fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// The row in an object of a file.
    pub(crate) fn row(&self, mut object: Map<String, Value>) -> Result<Row, Error> {
        if self.fields.is_empty() {
            return Row::from_fields(object);
        }
        let mut row = Map::new();
        // What goes with a form and does not make one stays, unless a column takes its name.
        for name in [
            "input",
            "history",
            "system",
            "tools",
            "chat_template_kwargs",
            "labels",
            "attention_mask",
            "completion_mask",
            "assistant_masks",
        ] {
            if let Some(value) = object.get(name) {
                row.insert(name.to_owned(), value.clone());
            }
        }
        for (name, column) in &self.fields {
            let Some(value) = object.get(column).cloned() else {
                let found = object.keys().cloned().collect();
                return Err(Error::MissingColumn { column: column.clone(), field: name.clone(), found });
            };
            row.insert(name.clone(), value);
        }
        object.clear();
        Row::from_fields(row)
    }
}

/// Objects of data files one after the other, with the file and the line (or row) each begins on. A row that is no
/// object is an error after which reading goes on.
pub(crate) struct Objects {
    files: VecDeque<PathBuf>,
    current: Option<(PathBuf, Box<dyn Iterator<Item = Read1>>)>,
}

/// An object of a file and its line, or why there is none.
type Read1 = Result<(usize, Map<String, Value>), (usize, Error)>;

/// An object of a file.
pub(crate) struct Object {
    pub path: PathBuf,
    pub line: usize,
    pub fields: Map<String, Value>,
}

impl Objects {
    /// The objects of a file, or of all data files in a folder in the order of their names.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let files = files(path)?;
        if let Some(text) = files.iter().find(|file| matches!(content(file), Ok(Content::Text))) {
            return Err(Error::FileKind { path: text.clone() });
        }
        let mut objects = Self { files: files.into(), current: None };
        // A file that is missing is reported now and not at the first row.
        objects.open_next()?;
        Ok(objects)
    }

    fn open_next(&mut self) -> Result<bool, Error> {
        let Some(path) = self.files.pop_front() else { return Ok(false) };
        let objects: Box<dyn Iterator<Item = Read1>> = match content(&path)? {
            Content::Json | Content::Text => {
                let values = JsonValues::new(BufReader::new(open(&path)?));
                Box::new(values.map(|found| {
                    let (line, text) = found?;
                    fields::object(&text).map(|fields| (line, fields)).map_err(|error| (line, unfinished(error, &text)))
                }))
            }
            #[cfg(feature = "parquet")]
            Content::Parquet => super::parquet::objects(&path)?,
            #[cfg(not(feature = "parquet"))]
            Content::Parquet => return Err(Error::NoParquet { path }),
        };
        self.current = Some((path, objects));
        Ok(true)
    }
}

/// A row that breaks off in a file of lines is most often an object written over several of them.
fn unfinished(error: Error, text: &str) -> Error {
    match error {
        Error::Json(cause) if cause.is_eof() && !text.contains('\n') => Error::Unfinished { cause },
        other => other,
    }
}

impl Iterator for Objects {
    type Item = Result<Object, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((path, objects)) = &mut self.current else {
                match self.open_next() {
                    Ok(true) => continue,
                    Ok(false) => return None,
                    Err(error) => return Some(Err(error)),
                }
            };
            match objects.next() {
                Some(Ok((line, fields))) => return Some(Ok(Object { path: path.clone(), line, fields })),
                Some(Err((_, Error::Unreadable(source)))) => {
                    let path = path.clone();
                    self.current = None;
                    self.files.clear();
                    return Some(Err(Error::Io { path, source }));
                }
                Some(Err((line, error))) => return Some(Err(error.at(path, line))),
                None => self.current = None,
            }
        }
    }
}

/// Rows of data files one after the other: `.jsonl` and `.json` (a row a line, an array of rows, or rows over several
/// lines), either with `.gz`, `.parquet` (feature `parquet`), or a folder of them. Byte order marks, line ends and
/// blank lines make no difference.
///
/// ```
/// # fn main() -> moe_data::Result<()> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("rows.json");
/// # std::fs::write(&path, r#"[{"question": "2 + 2?", "answer": "4"}]"#).unwrap();
/// use moe_data::{Reading, Row, Rows};
/// let fields = [("prompt", "question"), ("completion", "answer")].map(|(name, column)| (name.into(), column.into()));
/// let reading = Reading { fields: fields.into(), ..Reading::default() };
/// for row in Rows::open(&path, &reading)? {
///     assert_eq!(row?.1, Row::Completion { prompt: "2 + 2?".into(), completion: "4".into() });
/// }
/// # Ok(())
/// # }
/// ```
pub struct Rows {
    objects: Objects,
    reading: Reading,
    skipped: usize,
    first_skipped: Option<String>,
}

/// Where a row is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line it begins on, or the row of a table, from 1.
    pub line: usize,
}

impl Rows {
    /// Opens a file or a folder.
    ///
    /// # Errors
    /// A file that cannot be opened or is of no known kind, a folder without data files, unknown names of fields.
    pub fn open(path: impl AsRef<Path>, reading: &Reading) -> Result<Self, Error> {
        reading.check()?;
        let objects = Objects::open(path.as_ref())?;
        Ok(Self { objects, reading: reading.clone(), skipped: 0, first_skipped: None })
    }

    /// Rows left out so far, and why the first of them was.
    pub fn skipped(&self) -> (usize, Option<&str>) {
        (self.skipped, self.first_skipped.as_deref())
    }

    /// Leaves out a row that a later step found to be bad, if bad rows are skipped and it is the row that is bad.
    pub(crate) fn leave_out(&mut self, error: Error) -> Result<(), Error> {
        if !self.reading.skip_bad_rows || !error.is_of_a_row() {
            return Err(error);
        }
        self.skipped += 1;
        self.first_skipped.get_or_insert_with(|| error.to_string());
        Ok(())
    }
}

impl Iterator for Rows {
    type Item = Result<(Place, Row), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let row = self.objects.next()?.and_then(|Object { path, line, fields }| {
                let row = self.reading.row(fields).map_err(|error| error.at(&path, line))?;
                Ok((Place { path, line }, row))
            });
            match row {
                Ok(row) => return Some(Ok(row)),
                Err(error) => match self.leave_out(error) {
                    Ok(()) => {}
                    Err(error) => return Some(Err(error)),
                },
            }
        }
    }
}

/// What a data file holds, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Json,
    Text,
    Parquet,
}

/// What a data file holds, by its name.
pub(crate) fn content(path: &Path) -> Result<Content, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    match plain.rsplit_once('.').map(|(_, extension)| extension) {
        Some("jsonl" | "ndjson" | "json") => Ok(Content::Json),
        Some("txt") => Ok(Content::Text),
        Some("parquet") if plain == name => Ok(Content::Parquet),
        _ => Err(Error::FileKind { path: path.to_owned() }),
    }
}

/// A file's bytes, unpacked if it is a `.gz`.
pub(crate) fn open(path: &Path) -> Result<Box<dyn Read>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    let is_packed = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz"));
    Ok(if is_packed { Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))) } else { Box::new(file) })
}

/// The file itself, or the data files of a folder by name. Files that describe a data set are no rows of it.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if !path.is_dir() {
        content(path)?;
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
    let mut files =
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(path))).collect::<Result<Vec<_>, _>>()?;
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let describes =
            ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"].contains(&&*name);
        file.is_file() && content(file).is_ok() && !describes && !name.starts_with('.')
    });
    files.sort();
    match files.is_empty() {
        true => Err(Error::EmptyFolder { path: path.to_owned() }),
        false => Ok(files),
    }
}
