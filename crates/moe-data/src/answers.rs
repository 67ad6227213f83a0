//! The answer in a completion, for exact match.

// As Python strips, so that our counts are those of a reference evaluation in Python.
use crate::template::python::is_space;

/// The answer a completion gives: of its first line, what follows the last `####`, or else the line without its final
/// stops; white space around it is not part of it.
///
/// ```
/// use moe_data::extract_answer;
/// assert_eq!(extract_answer(" 25 + 11 = 36 #### 36\nQuestion: …"), "36");
/// assert_eq!(extract_answer(" North America.\n"), "North America");
/// ```
pub fn extract_answer(completion: &str) -> &str {
    let line = completion.split('\n').next().unwrap_or_default();
    // Split from the left, as the reference does: "##### 5" is "####" and then "# 5".
    match line.split("####").skip(1).last() {
        Some(answer) => answer.trim_matches(is_space),
        None => line.trim_matches(is_space).trim_end_matches('.'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_those_of_the_python_reference() {
        // Each pair as computed by: s = c.split("\n")[0]; s.split("####")[-1].strip() if "####" in s else
        // s.strip().rstrip(".")
        for (completion, answer) in [
            (" 25 + 11 = 36 ; 36 - 3 = 33 #### 33\n", "33"),
            (" Europe.\n", "Europe"),
            ("", ""),
            ("\nEurope", ""),
            ("#### 1 #### 2", "2"),
            ("#### 2.", "2."),
            ("##### 5", "# 5"),
            ("######## x", "x"),
            ("1 ####", ""),
            ("U.S...", "U.S"),
            ("a. .", "a. "),
            ("a. \r\nb", "a"),
            ("\u{a0}Yen.\u{1f}", "Yen"),
            ("1 = 2\n#### 3", "1 = 2"),
        ] {
            assert_eq!(extract_answer(completion), answer, "{completion:?}");
        }
    }
}
