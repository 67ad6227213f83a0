//! One HTML file with everything in it: no script, no font, no image that is not in the file.

mod merge;
mod routing;
mod run;
mod sections;

use std::path::Path;

use moe_checkpoint::{ScoreTable, write_atomic};

pub use routing::routing;
pub use run::write_run;
pub use sections::{ByExpert, FrontierPoint, Quality, Size, equal_bytes_table, frontier_table};

use crate::{Result, figures};

const STYLE: &str = include_str!("style.css");

/// A report under construction.
///
/// Every verb that measures writes one, from the same sections: [`importance`](Report::importance),
/// [`quality`](Report::quality), [`sizes`](Report::sizes), [`losses`](Report::losses), [`routing`](Report::routing),
/// [`widths`](Report::widths) and [`groups`](Report::groups).
#[derive(Clone, Debug)]
pub struct Report {
    title: String,
    body: String,
}

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), body: String::new() }
    }

    /// Begins a section.
    pub fn section(&mut self, heading: &str) {
        self.body.push_str(&format!("<h2>{}</h2>\n", escape(heading)));
    }

    /// Adds a paragraph of plain text.
    pub fn paragraph(&mut self, text: &str) {
        self.body.push_str(&format!("<p>{}</p>\n", escape(text)));
    }

    /// Adds an SVG figure and what it shows.
    pub fn figure(&mut self, svg: &str, caption: &str) {
        let (svg, caption) = (svg.trim_end(), escape(caption));
        self.body.push_str(&format!(
            "<figure>\n<div class=\"scroll\">{svg}</div>\n<figcaption>{caption}</figcaption>\n</figure>\n"
        ));
    }

    /// Adds a table.
    pub fn table(&mut self, table: &crate::table::Table) {
        self.body.push_str(&table.to_html());
    }

    /// Adds text that is shown as it is.
    pub fn preformatted(&mut self, text: &str) {
        self.body.push_str(&format!("<pre>{}</pre>\n", escape(text)));
    }

    /// The whole file.
    pub fn to_html(&self) -> String {
        let Self { title, body } = self;
        let (title, figures) = (escape(title), figures::STYLE);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
             <style>\n{STYLE}{figures}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
        )
    }
}

impl Report {
    /// Writes the file.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(write_atomic(path.as_ref(), self.to_html().as_bytes())?)
    }
}

/// What a model is called in headings: the name of its directory.
pub fn model_name(directory: &Path) -> String {
    // `.` and paths that end in `..` have a name only once they are resolved.
    let resolved = directory.canonicalize();
    let name = resolved.as_deref().unwrap_or(directory).file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| directory.display().to_string())
}

/// What the scorer of a table is called: its type, from its recipe.
pub fn scorer_name(scores: &ScoreTable) -> String {
    let recipe: serde_json::Value = serde_json::from_str(&scores.scorer).unwrap_or_default();
    recipe["type"].as_str().unwrap_or(&scores.scorer).to_string()
}

/// Text as HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_by_its_directory() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!([model_name(here), model_name(&here.join("src/.."))], ["moe", "moe"]);
        assert_eq!(model_name(Path::new("models/not-there")), "not-there");
    }

    #[test]
    fn text_is_escaped() {
        let mut report = Report::new("a < b & \"c\"");
        report.paragraph("<script>");
        let html = report.to_html();
        assert!(html.contains("<title>a &lt; b &amp; &quot;c&quot;</title>"));
        assert!(html.contains("<p>&lt;script&gt;</p>") && !html.contains("<script>"));
    }
}
