//! The evaluation as a page: `docs/reproduction.md` and its figures.

use std::fmt::Write as _;

use super::{Assumptions, Reproduction, svg};

impl Reproduction {
    /// How many rows are within a tenth of the paper's, of how many.
    fn near(&self) -> (usize, usize) {
        let near = self.rows.iter().filter(|row| row.is_near()).count();
        (near, self.rows.len())
    }

    /// The rows as a table for a terminal.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<58} {:>7} {:>7} {:>7}\n",
            "result", "paper", "ours", "ratio"
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "{:<58} {:>7.2} {:>7.2} {:>7.2}",
                row.name, row.paper, row.ours, row.ratio
            );
            if !row.note.is_empty() {
                let _ = writeln!(text, "    ratio {}", row.note);
            }
        }
        let (near, all) = self.near();
        let _ = writeln!(text, "{near} of {all} within 10 %");
        text
    }

    /// The page, in Markdown.
    pub fn markdown(&self) -> String {
        let (near, all) = self.near();
        let mut text = format!(
            "# The paper's evaluation, from first principles\n\n\
             `volley reproduce --docs docs` writes this page and its figures; a test holds them to what the program says. It is the performance model's word, not a measurement: \
             no GPU ran. {near} of {all} rows are within 10 % of the paper's (arXiv 2504.02263). Of the others the last column says which other reading of what the paper leaves open \
             brings them nearest, and what the ratio is then.\n\n\
             | result | paper | ours | ratio | other reading |\n|---|---|---|---|---|\n"
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.2} | {} |",
                row.name, row.paper, row.ours, row.ratio, row.note
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
        for (of, assumed) in Assumptions::table() {
            let _ = writeln!(text, "| {of} | {assumed} |");
        }
        self.sensitivity(&mut text);
        text
    }

    /// Every row under every reading.
    fn sensitivity(&self, text: &mut String) {
        *text += "\n## Other readings\n\nWhat each assumption is worth: ratios to the paper's if one is read otherwise; a dot where that changes less than 1 %.\n\n";
        let readings = Assumptions::readings();
        for (number, (reading, _)) in (1..).zip(&readings) {
            let _ = writeln!(text, "{number}. if {reading}");
        }
        *text += "\n| result | as above |";
        for number in 1..=readings.len() {
            let _ = write!(text, " {number} |");
        }
        *text += "\n|---|---|";
        *text += &"---|".repeat(readings.len());
        *text += "\n";
        for row in &self.rows {
            let _ = write!(text, "| {} | {:.2} |", row.name, row.ratio);
            for ratio in &row.readings {
                if (ratio / row.ratio - 1.0).abs() < 0.01 {
                    *text += " . |";
                } else {
                    let _ = write!(text, " {ratio:.2} |");
                }
            }
            *text += "\n";
        }
    }

    /// Name and content of each figure, as SVG.
    pub fn drawings(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.figures
            .iter()
            .map(|figure| (format!("{}.svg", figure.name), svg::draw(figure)))
    }
}
