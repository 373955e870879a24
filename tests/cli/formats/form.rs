//! The form of a JSON file: its keys in their order, the values that no model computes, and the types of the rest.

use std::fmt::{self, Display};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A JSON value whose objects keep the order of their keys, and whose integers are not floats.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = access.next_element()? {
            list.push(node);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = access.next_entry()? {
            fields.push(field);
        }
        Ok(Node::Object(fields))
    }
}

/// The type of a value that is not frozen: it may differ between machines or builds.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    Null,
    Bool,
    Integer,
    Float,
    Text,
    /// One of a few words.
    Word(&'static [&'static str]),
    /// Any number of values of one form.
    List(&'static Form),
    /// A list of fixed length.
    Tuple(&'static [Form]),
    /// An object with these keys in this order.
    Object(&'static [(&'static str, Form)]),
    /// One of several.
    Either(&'static [Form]),
    /// A value of this form. A null is shown as null, so the golden freezes whether there is a value.
    UnlessNull(&'static Form),
}

impl Form {
    /// Whether `node` has this form.
    fn fits(&self, node: &Node) -> bool {
        match (self, node) {
            (Form::Null, Node::Null)
            | (Form::Bool, Node::Bool(_))
            | (Form::Integer, Node::Integer(_))
            | (Form::Float, Node::Float(_))
            | (Form::Text, Node::Text(_)) => true,
            (Form::Word(words), Node::Text(text)) => words.contains(&text.as_str()),
            (Form::List(form), Node::List(list)) => list.iter().all(|node| form.fits(node)),
            (Form::Tuple(forms), Node::List(list)) => {
                forms.len() == list.len() && forms.iter().zip(list).all(|(form, node)| form.fits(node))
            }
            (Form::Object(forms), Node::Object(fields)) => {
                forms.len() == fields.len()
                    && forms.iter().zip(fields).all(|((a, form), (b, node))| a == b && form.fits(node))
            }
            (Form::Either(forms), node) => forms.iter().any(|form| form.fits(node)),
            (Form::UnlessNull(form), node) => form.fits(node),
            _ => false,
        }
    }
}

impl Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |forms: &[Form], between: &str| {
            forms.iter().map(Form::to_string).collect::<Vec<_>>().join(between)
        };
        match self {
            Form::Null => f.write_str("null"),
            Form::Bool => f.write_str("bool"),
            Form::Integer => f.write_str("integer"),
            Form::Float => f.write_str("float"),
            Form::Text => f.write_str("string"),
            Form::Word(words) => f.write_str(&words.join("|")),
            Form::List(form) => write!(f, "list of {form}"),
            Form::Tuple(forms) => write!(f, "[{}]", joined(forms, ", ")),
            Form::Object(forms) => {
                let fields: Vec<String> = forms.iter().map(|(key, form)| format!("{key}: {form}")).collect();
                write!(f, "{{{}}}", fields.join(", "))
            }
            Form::Either(forms) => f.write_str(&joined(forms, " or ")),
            Form::UnlessNull(form) => form.fmt(f),
        }
    }
}

/// Paths from the end, such as `estimate` or `outcome/best`, and the form of the value there.
pub type Rules<'a> = &'a [(&'a str, Form)];

/// The form of one JSON text.
///
/// A value without a rule is shown as it is. A value that breaks its rule is shown too, with a mark, so it differs
/// from any golden.
pub fn form_of_json(text: &str, rules: Rules<'_>) -> String {
    let node: Node = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"));
    render(&node, "", 0, rules) + "\n"
}

/// The form of JSON lines; equal neighbours count once.
pub fn form_of_lines(text: &str, rules: Rules<'_>) -> String {
    let mut forms: Vec<String> = text.lines().map(|line| form_of_json(line, rules)).collect();
    forms.dedup();
    forms.concat()
}

/// The form of a CSV table: its header, and of each row the columns named in `exact`; equal neighbours count once. No
/// cell may hold a quoted comma.
pub fn form_of_csv(text: &str, exact: &[&str]) -> String {
    let header: Vec<&str> = text.lines().next().unwrap_or_default().split(',').collect();
    let form = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), header.len(), "{line}");
        let cell = |(name, cell): (&&str, &&str)| match exact.contains(name) {
            true => (*cell).to_owned(),
            false if cell.is_empty() || cell.parse::<f64>().is_ok() => "<number>".to_owned(),
            false => format!("<no number: {cell}>"),
        };
        header.iter().zip(&cells).map(cell).collect::<Vec<_>>().join(",") + "\n"
    };
    let mut rows: Vec<String> = text.lines().skip(1).map(form).collect();
    rows.dedup();
    format!("{}\n{}", header.join(","), rows.concat())
}

fn render(node: &Node, path: &str, depth: usize, rules: Rules<'_>) -> String {
    let is_at = |end: &str| path == end || path.strip_suffix(end).is_some_and(|start| start.ends_with('/'));
    let rule = rules.iter().find(|(end, _)| is_at(end));
    if let Some((_, form)) = rule {
        return match (form, node) {
            (Form::UnlessNull(_), Node::Null) => literal(node),
            _ if form.fits(node) => format!("<{form}>"),
            _ => format!("<{form}, found {}>", literal(node)),
        };
    }
    let indent = "  ".repeat(depth + 1);
    let end = "  ".repeat(depth);
    match node {
        Node::Object(fields) if !fields.is_empty() => {
            let fields = fields.iter().map(|(key, value)| {
                let value = render(value, &format!("{path}/{key}"), depth + 1, rules);
                format!("{indent}{key:?}: {value}\n")
            });
            format!("{{\n{}{end}}}", fields.collect::<String>())
        }
        Node::List(list) if list.iter().any(|node| matches!(node, Node::Object(_) | Node::List(_))) => {
            let mut items: Vec<String> = list
                .iter()
                .map(|node| format!("{indent}{}\n", render(node, path, depth + 1, rules)))
                .collect();
            // Equal values without a placeholder are equal by chance, and their number is part of the file.
            items.dedup_by(|a, b| a == b && a.contains('<'));
            format!("[\n{}{end}]", items.concat())
        }
        node => literal(node),
    }
}

/// A value as JSON, on one line.
fn literal(node: &Node) -> String {
    match node {
        Node::Null => "null".into(),
        Node::Bool(value) => value.to_string(),
        Node::Integer(value) => value.to_string(),
        Node::Float(value) => format!("{value:?}"),
        Node::Text(text) => serde_json::to_string(text).unwrap(),
        Node::List(list) => format!("[{}]", list.iter().map(literal).collect::<Vec<_>>().join(", ")),
        Node::Object(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{key:?}: {}", literal(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

#[test]
fn a_form_shows_keys_order_types_and_values_without_a_rule() {
    let rules: Rules<'_> = &[("loss", Form::Float), ("best", Form::Tuple(&[Form::Integer, Form::Float]))];
    let form = |text: &str| form_of_json(text, rules);
    let good = form(r#"{"seed": 5, "loss": 0.25, "best": [3, 0.5]}"#);
    assert_eq!(good, "{\n  \"seed\": 5\n  \"loss\": <float>\n  \"best\": <[integer, float]>\n}\n");
    assert_eq!(form(r#"{"seed": 5, "loss": 0.75, "best": [4, 1.5]}"#), good);
    for other in [
        r#"{"loss": 0.25, "seed": 5, "best": [3, 0.5]}"#,
        r#"{"seed": 5.0, "loss": 0.25, "best": [3, 0.5]}"#,
        r#"{"seed": 6, "loss": 0.25, "best": [3, 0.5]}"#,
        r#"{"seed": 5, "loss": 1, "best": [3, 0.5]}"#,
        r#"{"seed": 5, "loss": null, "best": [3, 0.5]}"#,
        r#"{"seed": 5, "loss": 0.25, "best": [3]}"#,
        r#"{"seed": 5, "loss": 0.25, "best": [3, 0.5], "more": 1}"#,
        r#"{"seed": 5, "losses": 0.25, "best": [3, 0.5]}"#,
        r#"{"seed": 5, "loss": 0.25}"#,
    ] {
        assert_ne!(form(other), good, "{other}");
    }
}

#[test]
fn lists_of_one_form_collapse_and_lists_of_exact_values_do_not() {
    let rules: Rules<'_> = &[("x", Form::Float)];
    assert_eq!(form_of_json(r#"[{"x": 1.0}, {"x": 2.0}]"#, rules), form_of_json(r#"[{"x": 3.0}]"#, rules));
    assert_ne!(form_of_json(r#"[{"y": 1.0}, {"y": 1.0}]"#, rules), form_of_json(r#"[{"y": 1.0}]"#, rules));
}
