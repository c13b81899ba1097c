"use strict";
// Draws every chart of the page. Charts are drawn for light paper; in the dark the style sheet inverts them.
(() => {
  const options = {
    mode: "vega-lite",
    renderer: "svg",
    ast: true, // expressions are interpreted: the page's policy forbids eval
    actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
    downloadFileName: "patchclamp",
    tooltip: { theme: "custom" },
  };
  const draw = async (figure) => {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const place = figure.querySelector(".chart");
    try {
      await vegaEmbed(place, spec, { ...options, downloadFileName: figure.id || "patchclamp" });
      place.setAttribute("role", "img");
      place.setAttribute("aria-label", spec.description);
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    }
  };
  for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);
})();
