//! The evaluation as a page: `docs/reproduction.md` and its figures.

use std::fmt::Write as _;

use super::{ASSUMPTIONS, Reproduction, svg};

impl Reproduction {
    /// The rows as a table for a terminal.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<66} {:>7} {:>7} {:>7}\n",
            "result", "paper", "ours", "ratio"
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "{:<66} {:>7.2} {:>7.2} {:>7.2}",
                row.name, row.paper, row.ours, row.ratio
            );
        }
        let near = self
            .rows
            .iter()
            .filter(|row| (row.ratio - 1.0).abs() <= 0.1)
            .count();
        let _ = writeln!(text, "{near} of {} within 10 %", self.rows.len());
        text
    }

    /// The page, in Markdown.
    pub fn markdown(&self) -> String {
        let near = self
            .rows
            .iter()
            .filter(|row| (row.ratio - 1.0).abs() <= 0.1)
            .count();
        let mut text = format!(
            "# The paper's evaluation, from first principles\n\n\
             `volley reproduce --docs docs` writes this page and its figures; a test holds them to what the program says. It is the performance model's word, not a measurement: \
             no GPU ran. {near} of {} rows are within 10 % of the paper's (arXiv 2504.02263); what differs by more says why.\n\n\
             | result | paper | ours | ratio | |\n|---|---|---|---|---|\n",
            self.rows.len()
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.2} | {} |",
                row.name, row.paper, row.ours, row.ratio, row.explanation
            );
        }
        text += "\n## Figures\n\nLines are the model's, rings the paper's.\n";
        for figure in &self.figures {
            let _ = writeln!(
                text,
                "\n![{}](reproduction/{}.svg)",
                figure.title, figure.name
            );
        }
        text += "\n## Assumptions\n\nOne table for all rows; nothing is tuned per row.\n\n| of | assumed |\n|---|---|\n";
        for (of, assumed) in ASSUMPTIONS {
            let _ = writeln!(text, "| {of} | {assumed} |");
        }
        text
    }

    /// Name and content of each figure, as SVG.
    pub fn drawings(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.figures
            .iter()
            .map(|figure| (format!("{}.svg", figure.name), svg::draw(figure)))
    }
}
