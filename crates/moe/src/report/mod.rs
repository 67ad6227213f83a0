//! One HTML file with everything in it: no script, no font, no image that is not in the file.

mod run;

pub use run::write_run;

use crate::figures;

const STYLE: &str = include_str!("style.css");

/// A report under construction.
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
        self.body.push_str(&format!("<figure>\n{svg}\n<figcaption>{}</figcaption>\n</figure>\n", escape(caption)));
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

/// Text as HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let mut report = Report::new("a < b & \"c\"");
        report.paragraph("<script>");
        let html = report.to_html();
        assert!(html.contains("<title>a &lt; b &amp; &quot;c&quot;</title>"));
        assert!(html.contains("<p>&lt;script&gt;</p>") && !html.contains("<script>"));
    }
}
