//! Formats activations and retrieval as terminal tables, CSV and HTML pages.

use maud::html;

use crate::interp::activations::{Activations, Interval, LanguageActivation, MEASURED};
use crate::interp::retrieval::{Correlation, Retrieval};
use crate::report::axis::AxisUnit;
use crate::report::grid::{Grid, Row};
use crate::report::line_plot::{Series, line_plot};
use crate::report::{csv, format, html as page, terminal};
use crate::study::retrieval::{LanguageRetrieval, NamedCorrelation, RetrievalReport};
use crate::text::printable;

fn interval(interval: Option<Interval>) -> String {
    match interval {
        None => format::NONE.into(),
        Some(Interval { value, low: Some(low), high: Some(high) }) => {
            format!("{value:.4} [{low:.4}, {high:.4}]")
        }
        Some(Interval { value, .. }) => format!("{value:.4}"),
    }
}

impl Activations {
    fn grid(&self) -> Grid {
        let title =
            format!("Mean activation of {} neurons over {} greedy tokens", self.n_neurons, self.n_predict);
        let mut header = vec!["Lang".to_owned(), "Prompts".into(), "A".into()];
        header.extend(self.b.is_some().then(|| ["B".to_owned(), "B - A".into()]).into_iter().flatten());
        let rows = self.languages.iter().map(|l| {
            let mut cells = vec![l.n_prompts.to_string()];
            match self.b {
                // Three intervals do not fit in 80 columns.
                Some(_) => cells.extend([
                    format!("{:.4}", l.a.value),
                    l.b.map_or(format::NONE.into(), |b| format!("{:.4}", b.value)),
                    interval(l.difference),
                ]),
                None => cells.push(interval(Some(l.a))),
            }
            Row { label: l.language.clone(), cells, is_mean: false, better: None }
        });
        Grid { title, header, rows: rows.collect() }
    }

    fn legend(&self) -> String {
        let b = self.b.as_ref().map_or(String::new(), |b| format!("; B: {b}"));
        let measured =
            if self.measured == MEASURED { " Measured before edits of the neurons themselves." } else { "" };
        format!("A: {}{b}. [low, high]: 95% interval, bootstrap over prompts.{measured}", self.a)
    }

    /// Formats a table of at most 80 columns.
    pub fn to_terminal(&self, colour: bool) -> String {
        let mut text = String::new();
        terminal::push_table(&mut text, &self.grid(), colour);
        text.push('\n');
        text.push_str(&terminal::wrapped(&self.legend(), ""));
        text
    }

    /// Formats CSV: language, n_prompts, then a, b and difference, each with low and high.
    pub fn to_csv(&self) -> String {
        let header = [
            "language",
            "n_prompts",
            "a",
            "a_low",
            "a_high",
            "b",
            "b_low",
            "b_high",
            "difference",
            "difference_low",
            "difference_high",
        ];
        let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        let rows = self.languages.iter().map(|l| {
            let mut row = vec![l.language.clone(), l.n_prompts.to_string()];
            for interval in [Some(l.a), l.b, l.difference] {
                row.push(number(interval.map(|i| i.value)));
                row.push(number(interval.and_then(|i| i.low)));
                row.push(number(interval.and_then(|i| i.high)));
            }
            row
        });
        csv::table_to_csv(&header, rows)
    }

    /// Formats a page with a plot (languages from left to right) and the table.
    pub fn to_html(&self) -> String {
        let series =
            |name: &str, is_reference: bool, of: &dyn Fn(&LanguageActivation) -> Option<Interval>| Series {
                name: name.to_owned(),
                is_reference,
                points: (self.languages.iter().enumerate())
                    .filter_map(|(i, l)| of(l).map(|v| ((i + 1) as f64, v.value, v.low, v.high)))
                    .collect(),
            };
        let mut lines = vec![series("A", self.b.is_some(), &|l| Some(l.a))];
        if self.b.is_some() {
            lines.push(series("B", false, &|l| l.b));
        }
        let order = self.languages.iter().enumerate().map(|(i, l)| format!("{} {}", i + 1, l.language));
        let body = html! {
            h1 { "Neuron activations" }
            p { (printable(&self.legend())) }
            p.soft {
                "Activations after the non-linearity and gate, at the last position of each step. A less toxic model"
                " should use these neurons less: B (dots) lies below A (squares, dashed), also in languages it was not"
                " trained on."
            }
            figure {
                figcaption { "Languages: " (order.collect::<Vec<_>>().join(", ")) }
                (line_plot("activations", "Mean activation by language", "language", &lines, None, AxisUnit::Plain))
            }
            (page::table(&self.grid()))
        };
        page::page("Neuron activations", &body)
    }
}

impl RetrievalReport {
    fn grid(&self) -> Grid {
        let has_falls = self.languages.iter().any(|l| l.toxicity_fall.is_some());
        let mut header = vec!["Lang".to_owned(), "top-1 accuracy".into(), "mean cosine".into()];
        header.extend(has_falls.then(|| "fall of EMT".to_owned()));
        let rows = self.languages.iter().map(|l| {
            let mut cells = vec![format!("{:.1}%", 100.0 * l.mean_accuracy), format!("{:.3}", l.mean_cosine)];
            if has_falls {
                cells.push(l.toxicity_fall.map_or(format::NONE.into(), |f| format!("{:.1}%", 100.0 * f)));
            }
            Row { label: l.language.clone(), cells, is_mean: false, better: None }
        });
        let title = format!(
            "Retrieval of {} sentences against {}, mean over {} places",
            self.n_sentences,
            self.pivot,
            self.places.len()
        );
        Grid { title, header, rows: rows.collect() }
    }

    fn correlations_in_words(&self) -> Vec<String> {
        let words = |c: &NamedCorrelation| match c.correlation {
            Some(Correlation { r, p, n }) => {
                format!(
                    "Correlation of {} with the fall of expected maximum toxicity: Pearson r = {r:.3}, two-sided \
                     p = {p:.4}, n = {n} languages.",
                    c.of
                )
            }
            None => format!("Correlation of {}: not computed, too few languages or no variance.", c.of),
        };
        self.correlations.iter().map(words).collect()
    }

    /// Formats a table of at most 80 columns.
    pub fn to_terminal(&self, colour: bool) -> String {
        let mut text = String::new();
        terminal::push_table(&mut text, &self.grid(), colour);
        text.push('\n');
        for line in self.correlations_in_words().iter().map(String::as_str).chain([MEANING]) {
            text.push_str(&terminal::wrapped(line, ""));
        }
        text
    }

    /// Formats CSV: language, place, forward_accuracy, backward_accuracy, mean_cosine.
    pub fn to_csv(&self) -> String {
        let header = ["language", "place", "forward_accuracy", "backward_accuracy", "mean_cosine"];
        let rows = self.languages.iter().flat_map(|l| {
            self.places.iter().zip(&l.places).map(|(place, r)| {
                vec![
                    l.language.clone(),
                    place.clone(),
                    r.forward_accuracy.to_string(),
                    r.backward_accuracy.to_string(),
                    r.mean_cosine.to_string(),
                ]
            })
        });
        csv::table_to_csv(&header, rows)
    }

    /// Formats a page with means over languages by place, the table, and correlations.
    pub fn to_html(&self) -> String {
        let n = self.languages.len().max(1) as f64;
        let line = |name: &str, is_reference: bool, of: &dyn Fn(&Retrieval) -> f64| Series {
            name: name.to_owned(),
            is_reference,
            points: (0..self.places.len())
                .map(|i| {
                    (i as f64, self.languages.iter().map(|l| of(&l.places[i])).sum::<f64>() / n, None, None)
                })
                .collect(),
        };
        let lines = [
            line("top-1 accuracy", false, &|r| (r.forward_accuracy + r.backward_accuracy) / 2.0),
            line("mean cosine", true, &|r| r.mean_cosine),
        ];
        let fall = |l: &LanguageRetrieval| Some((l.mean_accuracy, l.toxicity_fall?, None, None));
        let mut points: Vec<_> = self.languages.iter().filter_map(fall).collect();
        points.sort_by(|a: &(f64, f64, _, _), b| a.0.total_cmp(&b.0));
        let falls = [Series { name: "languages".into(), is_reference: false, points }];
        let title = "Fall of toxicity by accuracy";
        let body = html! {
            h1 { "Bilingual sentence retrieval" }
            p { (printable(&self.model)) }
            p.soft { (MEANING) }
            figure {
                figcaption {
                    "Mean over languages at each place, from the embeddings (0) to the final norm. Dots: top-1"
                    " accuracy; squares, dashed: mean cosine."
                }
                (line_plot("retrieval", "Retrieval by place", "place", &lines, None, AxisUnit::Plain))
            }
            (page::table(&self.grid()))
            @if !self.correlations.is_empty() {
                h2 { "Correlation with the fall of toxicity" }
                @for words in self.correlations_in_words() { p { (words) } }
                figure {
                    figcaption {
                        "One point per language: top-1 accuracy (horizontal), and the fraction by which expected maximum"
                        " toxicity fell (vertical)."
                    }
                    (line_plot("falls", title, "top-1 accuracy", &falls, None, AxisUnit::Plain))
                }
            }
        };
        page::page("Bilingual sentence retrieval", &body)
    }
}

const MEANING: &str = "Top-1 accuracy is the share of sentences whose nearest neighbour in the other language is \
    their translation, averaged over both directions. Mean cosine is the mean over aligned pairs. The paper's code \
    prints it as \"Retrieval acc\", but it is not an accuracy.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_formatted_in_every_form_and_fit_in_80_columns() {
        let value = |value: f64| Interval { value, low: Some(value - 0.1), high: Some(value + 0.1) };
        let found = Activations {
            a: "m.gguf".into(),
            b: Some("m.gguf with <x>".into()),
            n_neurons: 36,
            n_predict: 20,
            measured: MEASURED.into(),
            languages: vec![LanguageActivation {
                language: "en".into(),
                n_prompts: 16,
                a: value(0.104),
                b: Some(value(-0.0047)),
                difference: Some(value(-0.1087)),
            }],
        };
        let terminal = found.to_terminal(false);
        assert!(terminal.contains("-0.1087 [-0.2087, -0.0087]"), "{terminal}");
        assert!(terminal.lines().all(|line| line.chars().count() <= 80), "{terminal}");
        assert!(found.to_csv().contains("en,16,0.104,"));
        let html = found.to_html();
        assert!(html.contains("with &lt;x&gt;") && html.contains("A: 0.104 at 1; B: -0.005 at 1"), "{html}");
    }

    #[test]
    fn retrieval_explains_its_numbers_and_fits_in_80_columns() {
        let r = |a: f64| Retrieval { forward_accuracy: a, backward_accuracy: 1.0, mean_cosine: 0.9 };
        let report = RetrievalReport {
            model: "m.gguf".into(),
            pivot: "en".into(),
            n_sentences: 120,
            places: vec!["embedding".into(), "final norm".into()],
            languages: vec![LanguageRetrieval {
                language: "de".into(),
                places: vec![r(0.5), r(1.0)],
                mean_accuracy: 0.875,
                mean_cosine: 0.9,
                toxicity_fall: Some(0.25),
            }],
            correlations: vec![NamedCorrelation {
                of: "top-1 accuracy".into(),
                correlation: Some(Correlation { r: 0.732, p: 0.0013, n: 16 }),
            }],
        };
        let terminal = report.to_terminal(false);
        assert!(terminal.contains("87.5%") && terminal.contains("r = 0.732"), "{terminal}");
        assert!(
            terminal.replace('\n', " ").contains("not an accuracy")
                && terminal.lines().all(|l| l.chars().count() <= 80)
        );
        assert!(report.to_csv().contains("de,embedding,0.5,1,0.9"));
        let html = report.to_html();
        assert!(html.contains("not an accuracy") && !html.contains("NaN"));
    }
}
