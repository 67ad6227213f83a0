//! Tables, as text and as HTML.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table as TextTable};

use crate::report::escape;

/// A table whose columns after the first `left` hold numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// Columns that are text.
    pub left: usize,
    /// The cells, row by row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(header: impl IntoIterator<Item = impl Into<String>>, left: usize) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), left, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        self.text_table().to_string()
    }

    /// For a terminal, within so many columns: cells of sentences take several lines.
    pub fn to_text_within(&self, columns: u16) -> String {
        self.text_table().set_content_arrangement(ContentArrangement::Dynamic).set_width(columns).to_string()
    }

    fn text_table(&self) -> TextTable {
        let mut table = TextTable::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header(&self.header).add_rows(&self.rows);
        for column in table.column_iter_mut().skip(self.left) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    /// For a page of documentation.
    pub fn to_markdown(&self) -> String {
        let cell = |text: &String| text.replace('|', "\\|");
        let line = |cells: &[String]| format!("| {} |\n", cells.iter().map(cell).collect::<Vec<_>>().join(" | "));
        let rule = |column: usize| if column < self.left { "---|" } else { "--:|" };
        let rules: String = (0..self.header.len()).map(rule).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("{}|{rules}\n{rows}", line(&self.header))
    }

    /// For a report.
    pub fn to_html(&self) -> String {
        let cell = |tag: &str, column: usize, text: &str| {
            let class = if column < self.left { "" } else { " class=\"number\"" };
            format!("<{tag}{class}>{}</{tag}>", escape(text))
        };
        let line = |tag: &str, cells: &[String]| {
            let cells: String = cells.iter().enumerate().map(|(column, text)| cell(tag, column, text)).collect();
            format!("<tr>{cells}</tr>\n")
        };
        let rows: String = self.rows.iter().map(|row| line("td", row)).collect();
        let header = line("th", &self.header);
        format!("<div class=\"scroll\"><table>\n<thead>{header}</thead>\n<tbody>\n{rows}</tbody></table></div>\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_aligns_numbers() {
        let mut table = Table::new(["name", "a|b"], 1);
        table.row(["x", "1"]);
        assert_eq!(table.to_markdown(), "| name | a\\|b |\n|---|--:|\n| x | 1 |\n");
    }
}
