/* Shows one text of each figure on the page: the one for its prompt and its strengths. */
for (const figure of document.querySelectorAll(".oneshot-figure:not([data-ready])")) {
  figure.dataset.ready = "";
  const all = what => [...figure.querySelectorAll(what)], prompt = figure.querySelector("select"), ranges = all("input");
  const show = () => {
    const at = ranges.map(range => range.dataset.values.split(" ")[range.value]);
    ranges.forEach((range, i) => {
      range.setAttribute("aria-valuetext", at[i]);
      range.closest(".oneshot-dial").querySelector("output").textContent = at[i];
    });
    for (const one of all(".oneshot-for")) one.hidden = one.dataset.prompt !== prompt.value;
    for (const one of all(".oneshot-at")) one.hidden = one.dataset.at !== at.join(" ");
  };
  for (const control of [prompt, ...ranges]) control.addEventListener("input", show);
  figure.querySelector(".oneshot-controls").hidden = false;
  show();
}
